"""What training minimises: functions of a packed batch, one module for each."""
