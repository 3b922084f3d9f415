"""What fits in so many bytes: plans that compete, and what plain rounding gives beside them."""
