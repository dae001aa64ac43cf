# The agent's image, for who has a docker daemon. `cargo xtask image` makes the same without one, and leaves the static binary
# where this file looks for it:
#
#   cargo xtask image && docker build --tag localhost/sluice:0.1.0 .
#   cargo xtask image && docker build --tag localhost/sluice:0.1.0-debug --target debug .

# With a shell and the tools that look into the kernel.
FROM debian:12-slim AS debug
RUN apt-get update \
    && apt-get install --yes --no-install-recommends bpftool iproute2 \
    && rm -rf /var/lib/apt/lists/*
COPY target/image/sluice /sluice
ENTRYPOINT ["/sluice"]

FROM scratch AS agent
LABEL org.opencontainers.image.title="sluice" \
      org.opencontainers.image.description="A Service proxy for Kubernetes nodes, in BPF" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY target/image/sluice /sluice
ENTRYPOINT ["/sluice"]
