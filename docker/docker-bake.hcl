# `make build` calls this; versions come from versions.env through the environment.
variable "BASE_IMAGE" { default = "debian:bookworm-slim" }
variable "REGISTRY" { default = "" }
variable "EPD_VERSION" { default = "dev" }
variable "EPD_INPUTS" { default = "" }
variable "EPD_REVISION" { default = "" }
variable "VLLM_VERSION" { default = "" }
variable "VLLM_ASCEND_VERSION" { default = "" }
variable "MOONCAKE_VERSION" { default = "" }
variable "CA_BUNDLE" { default = "/etc/ssl/certs/ca-certificates.crt" }

group "default" { targets = ["cpu", "proxy"] }

target "_common" {
  context = "."
  # A private CA that signs for the package index; used while building, never part of an image.
  # The addresses of mirrors are secrets too: they may hold a password, and arguments stay in an image's history.
  secret = ["id=ca,src=${CA_BUNDLE}", "id=pip_index_url,env=PIP_INDEX_URL", "id=torch_index_url,env=TORCH_INDEX_URL"]
  args = {
    BASE_IMAGE   = BASE_IMAGE
    EPD_VERSION  = EPD_VERSION
    EPD_INPUTS   = EPD_INPUTS
    EPD_REVISION = EPD_REVISION
  }
}

target "cpu" {
  inherits   = ["_common"]
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

target "proxy" {
  inherits   = ["_common"]
  dockerfile = "docker/proxy/Dockerfile"
  tags       = ["${REGISTRY}ascend-epd-proxy:${EPD_VERSION}"]
}
