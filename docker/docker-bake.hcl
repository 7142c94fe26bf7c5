# `make build` calls this; versions come from versions.env through the environment.
variable "BASE_IMAGE" { default = "debian:bookworm-slim" }
variable "REGISTRY" { default = "" }
variable "EPD_VERSION" { default = "dev" }
variable "EPD_INPUTS" { default = "" }
variable "EPD_REVISION" { default = "" }
variable "VLLM_VERSION" { default = "" }
variable "VLLM_ASCEND_VERSION" { default = "" }
# Of the target `cpu-compat`: a folder of docker/cpu/compat.
variable "COMPAT_VLLM_VERSION" { default = "" }
variable "MOONCAKE_VERSION" { default = "" }
variable "MOONCAKE_NPU_VERSION" { default = "" }
variable "CANN_VERSION" { default = "" }
variable "CA_BUNDLE" { default = "/etc/ssl/certs/ca-certificates.crt" }
# Where the images `cann` and `vllm-ascend` are pulled from; a mirror has the same two below its own name.
variable "EPD_ASCEND_REGISTRY" { default = "quay.io/ascend" }
# What the Ascend images are built on: `vendor`, vllm-ascend's own image, or `cann`.
variable "EPD_ASCEND_SERVING" { default = "vendor" }
# For publishing: both architectures, SBOM and provenance. The engine's own image store takes neither.
variable "RELEASE" { default = "" }

group "default" { targets = ["cpu", "proxy"] }
group "release" { targets = ["cpu", "proxy", "store", "ascend"] }

target "_common" {
  context   = "."
  platforms = RELEASE == "" ? [] : ["linux/amd64", "linux/arm64"]
  attest    = RELEASE == "" ? [] : ["type=sbom", "type=provenance,mode=max"]
  # A private CA that signs for the package index; used while building, never part of an image.
  # The addresses of mirrors are secrets too: they may hold a password, and arguments stay in an image's history.
  secret = ["id=ca,src=${CA_BUNDLE}", "id=pip_index_url,env=PIP_INDEX_URL", "id=torch_index_url,env=TORCH_INDEX_URL"]
  args = {
    EPD_VERSION  = EPD_VERSION
    EPD_INPUTS   = EPD_INPUTS
    EPD_REVISION = EPD_REVISION
  }
}

target "_debian" {
  inherits = ["_common"]
  secret   = ["id=os_mirror_url,env=EPD_DEBIAN_MIRROR"]
  args     = { BASE_IMAGE = BASE_IMAGE }
}

target "cpu" {
  inherits   = ["_debian"]
  dockerfile = "docker/cpu/Dockerfile"
  tags       = ["${REGISTRY}ascend-epd-cpu:${EPD_VERSION}"]
  args = {
    VLLM_VERSION        = VLLM_VERSION
    VLLM_ASCEND_VERSION = VLLM_ASCEND_VERSION
    MOONCAKE_VERSION    = MOONCAKE_VERSION
  }
}

target "cpu-test" {
  inherits = ["cpu"]
  target   = "test"
  tags     = ["${REGISTRY}ascend-epd-cpu-test:${EPD_VERSION}"]
}

# The CPU image with another vLLM, for `make test-compat`; without vllm-ascend, which is for one vLLM alone.
target "cpu-compat" {
  inherits = ["cpu"]
  tags     = ["${REGISTRY}ascend-epd-cpu:${EPD_VERSION}-vllm${COMPAT_VLLM_VERSION}"]
  args = {
    LOCKS               = "compat/${COMPAT_VLLM_VERSION}"
    VLLM_VERSION        = COMPAT_VLLM_VERSION
    VLLM_ASCEND_VERSION = "none"
  }
}

target "cpu-compat-test" {
  inherits = ["cpu-compat"]
  target   = "test"
  tags     = ["${REGISTRY}ascend-epd-cpu-test:${EPD_VERSION}-vllm${COMPAT_VLLM_VERSION}"]
}

target "proxy" {
  inherits   = ["_debian"]
  dockerfile = "docker/proxy/Dockerfile"
  tags       = ["${REGISTRY}ascend-epd-proxy:${EPD_VERSION}"]
}

target "proxy-test" {
  inherits = ["proxy"]
  target   = "test"
  tags     = ["${REGISTRY}ascend-epd-proxy-test:${EPD_VERSION}"]
}

target "store" {
  inherits   = ["_debian"]
  dockerfile = "docker/store/Dockerfile"
  tags       = ["${REGISTRY}ascend-epd-store:${EPD_VERSION}"]
  args       = { MOONCAKE_VERSION = MOONCAKE_VERSION }
}

# a2, a3, a5 on Ubuntu, and the same with -openeuler.
target "ascend" {
  name = "${hardware.name}${os.suffix}"
  matrix = {
    # What CANN's and vllm-ascend's image call each, and the chip that vllm-ascend's own Dockerfile compiles for.
    hardware = [
      { name = "a2", cann = "910b", vendor = "", soc = "ascend910b1" },
      { name = "a3", cann = "a3", vendor = "-a3", soc = "ascend910_9391" },
      { name = "a5", cann = "950", vendor = "-a5", soc = "ascend950dt_9582" },
    ]
    os = [
      { name = "ubuntu22.04", suffix = "" },
      { name = "openeuler24.03", suffix = "-openeuler" },
    ]
  }
  inherits   = ["_common"]
  dockerfile = "docker/ascend/Dockerfile"
  tags       = ["${REGISTRY}ascend-epd-${hardware.name}:${EPD_VERSION}${os.suffix}"]
  secret     = ["id=ascend_index_url,env=ASCEND_INDEX_URL", "id=os_mirror_url,env=EPD_OS_MIRROR_URL"]
  args = {
    SERVING              = EPD_ASCEND_SERVING
    SERVING_IMAGE        = EPD_ASCEND_SERVING == "cann" ? "${EPD_ASCEND_REGISTRY}/cann:${CANN_VERSION}-${hardware.cann}-${os.name}-py3.12" : "${EPD_ASCEND_REGISTRY}/vllm-ascend:v${VLLM_ASCEND_VERSION}${hardware.vendor}${os.suffix}"
    SOC_VERSION          = hardware.soc
    EPD_HARDWARE         = hardware.name
    CANN_VERSION         = CANN_VERSION
    VLLM_VERSION         = VLLM_VERSION
    VLLM_ASCEND_VERSION  = VLLM_ASCEND_VERSION
    MOONCAKE_NPU_VERSION = MOONCAKE_NPU_VERSION
  }
}
