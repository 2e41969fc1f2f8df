"""What a training changes, saves and resumes."""
