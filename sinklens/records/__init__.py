"""Files that appear whole or not at all, where numbers come from, and values as people and JSON can hold them."""
