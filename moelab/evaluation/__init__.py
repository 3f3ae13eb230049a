"""What a trained model is worth, and how it leaves the house: Hugging Face formats today."""
