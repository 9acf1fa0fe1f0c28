# A GPU image with everything that `fastsdpo train` needs:
#   docker build -t fastsdpo . && docker run --gpus all -v "$PWD":/work fastsdpo doctor
FROM python:3.12-slim
# The compiler builds the CPU kernels now and Triton's launchers at run time.
RUN apt-get update && apt-get install -y --no-install-recommends g++ libgomp1 && rm -rf /var/lib/apt/lists/*
COPY . /source
# Without the kernels the build would go on, and nobody would see it: here it fails.
RUN FASTSDPO_REQUIRE_NATIVE=1 pip install --no-cache-dir "/source[train,online,fast]" && rm -rf /source
WORKDIR /work
ENTRYPOINT ["fastsdpo"]
CMD ["--help"]
