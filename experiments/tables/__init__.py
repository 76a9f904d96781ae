"""Recipes that write a page of docs/ from what they compute."""
