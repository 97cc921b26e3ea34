"""One command that measures this project on a GPU, beside diffusers."""
