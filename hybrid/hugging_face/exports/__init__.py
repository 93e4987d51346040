"""What an export is made of: names, files and their headers, the slices that ranks write, the folder as it appears."""
