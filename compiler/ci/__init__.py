"""`ingot ci`: a matrix of recipes, schemes and targets: built, proved, compared with what is in production, shipped."""
