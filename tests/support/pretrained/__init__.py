"""Small pretrained folders of every family, made on the spot."""
