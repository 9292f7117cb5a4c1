"""What a run of any task shares: its folder's owner, where it stands, when it saves and stops."""
