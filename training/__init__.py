"""Scripts that train and fine-tune models. Each imports the package alone; only `quickstart` calls the others."""
