"""The replicas of the deployments that compute: text encoders, UNets, ControlNets, VAEs, upscalers."""
