# The image of Motet: one for engine, gateway and operator; a container's command picks which. It runs as user 65532 and
# writes nothing outside of the volumes it is given, so its root can be read-only.
#
#   docker build -t motet .                        runs on the CPU: Node, Motet, and the libraries that they load
#   docker build -t motet:cuda --target cuda .     the same on NVIDIA's runtime image
#
# What is in it decides scripts/image-files.sh.

FROM node:24-bookworm AS build
WORKDIR /motet
COPY . .
RUN MOTET_CACHE=/tmp/motet bash scripts/setup.sh --native-only
RUN scripts/image-files.sh /image

# The engine computes on the CPU only, so far. This variant carries CUDA's libraries for nodes and policies that want
# them there; it computes no faster.
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04 AS cuda
COPY --from=build /image/usr/local/bin /usr/local/bin
COPY --from=build /image/app /app
WORKDIR /app
ENV PATH=/usr/local/bin:/usr/bin:/bin NODE_ENV=production
USER 65532:65532
CMD ["node", "engine/main.ts", "--help"]

FROM scratch AS cpu
COPY --from=build /image /
WORKDIR /app
ENV PATH=/usr/local/bin:/usr/bin:/bin NODE_ENV=production
USER 65532:65532
CMD ["node", "engine/main.ts", "--help"]
