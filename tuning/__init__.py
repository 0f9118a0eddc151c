"""Finding the fastest setting whose pictures still follow their condition: search, confirmation, preset."""
