"""Restoring pictures, clips and arrays: in tiles, at any size, with the routing drawn."""
