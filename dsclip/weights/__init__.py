"""Models made of the weights of others: averages and interpolations (soups), and sparse differences that are added up."""
