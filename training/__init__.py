"""What made the embedded models: data from package registries, the recipe, the gates. `make train`, `make gates`."""
