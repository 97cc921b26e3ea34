"""Training of the embedded models: data from package registries, recipe, gates. `make train`, `make gates`."""
