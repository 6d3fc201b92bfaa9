"""The demo's data and prompts: real digits and rendered scenes, small enough for a CPU, and free to ship."""
