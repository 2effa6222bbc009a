"""One config per model; each is a recipe from `recipes.py` and the model's name."""
