"""Card templates, installed as the package `decaf_hf.model_cards` so that an installed wheel finds them."""
