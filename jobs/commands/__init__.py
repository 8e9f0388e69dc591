"""The commands of `convmae`, by what they are about. jobs.cli puts them together."""
