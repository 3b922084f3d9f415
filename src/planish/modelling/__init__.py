"""What blocks are made of. These files travel in compressed folders and import nothing of planish outside this room."""
