"""Parser of compiled HLO text."""
