"""What only the command line needs: data sets, their problem, runs, pictures."""
