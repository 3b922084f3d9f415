"""Storage types of weights and rounding to them; free changes of a block's basis before. Nothing here reads or writes files."""
