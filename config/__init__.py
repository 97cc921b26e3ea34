"""The server's catalog and the settings of a process, validated when they are loaded. Imports neither torch nor ray."""
