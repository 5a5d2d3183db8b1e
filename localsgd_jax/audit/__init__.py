"""`localsgd audit`: what a program of the user's sends, on devices present or not."""
