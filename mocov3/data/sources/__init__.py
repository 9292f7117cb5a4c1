"""Where images come from: folders, lists, archives, tables; which belong to which split; what is in them."""
