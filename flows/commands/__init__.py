"""What each command does, from plain values to plain values, cut by what each must import."""
