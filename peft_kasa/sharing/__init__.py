"""What leaves the process: plain LoRAs, the Hub, other servers, other clients."""
