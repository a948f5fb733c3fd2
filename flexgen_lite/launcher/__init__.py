"""An engine as a child of this process: started, listened to, started again."""
