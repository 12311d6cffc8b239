"""Matrix products with expert weights, each way of computing them behind the same signature."""
