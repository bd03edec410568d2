# The CUDA compiler and how CUDA code is built. NIBBLE_CUDA is TRUE when the CUDA backend is part of this build.
set(NIBBLE_CUDA FALSE)
set(NIBBLE_CUDA_ARCHITECTURES "80;89;90a" CACHE STRING "Compute capabilities to build kernels for: some of 80, 89, 90a")
if(NIBBLE_WITH_CUDA)
  find_program(NIBBLE_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin /usr/local/cuda/bin)
  if(NOT NIBBLE_NVCC)
    message(WARNING "NIBBLE_WITH_CUDA is on, but there is no nvcc (looked in PATH, CUDA_HOME and /usr/local/cuda): building for CPUs only")
  else()
    set(CMAKE_CUDA_COMPILER ${NIBBLE_NVCC})
    set(CMAKE_CUDA_ARCHITECTURES OFF)  # each target names its own
    set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_SOURCE_DIR}/tools/cmake/check_ptxas.sh ${CMAKE_CXX_COMPILER_LAUNCHER})
    enable_language(CUDA)
    # CMake 3.25 does not know the dialects of CUDA 13.
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
    find_package(CUDAToolkit REQUIRED)
    string(REGEX REPLACE "[a-z]" "" NIBBLE_CUDA_CAPABILITIES "${NIBBLE_CUDA_ARCHITECTURES}")
    string(REPLACE ";" "," NIBBLE_CUDA_CAPABILITIES "${NIBBLE_CUDA_CAPABILITIES}")
    set(NIBBLE_CUDA TRUE)
  endif()
endif()

# nibble_cuda_library(NAME n SRCS ... LIBS ... ARCHITECTURES 80 90a)   CUDA kernels behind plain C++ headers, built for
# those of the architectures that NIBBLE_CUDA_ARCHITECTURES names; nothing in a build without CUDA.
# nibble_cuda_binary(...)   the same arguments; an executable.
# --fmad=false: a row's bits must not depend on what the compiler chose to fuse; fused multiply-adds are written as such,
# as on the CPU. Kernels that spill registers do not build (check_ptxas.sh).
function(_nibble_cuda_configure name)
  cmake_parse_arguments(A "" "" "LIBS;ARCHITECTURES" ${ARGN})
  set(code "")
  foreach(architecture ${A_ARCHITECTURES})
    if(architecture IN_LIST NIBBLE_CUDA_ARCHITECTURES)
      list(APPEND code "SHELL:-gencode=arch=compute_${architecture},code=sm_${architecture}")
    endif()
  endforeach()
  _nibble_configure(${name} LIBS ${A_LIBS} CUDA::cudart_static)
  target_compile_options(${name} PRIVATE
    "$<$<COMPILE_LANGUAGE:CUDA>:--fmad=false;-Xcompiler=-Wall,-fPIC>" "$<$<COMPILE_LANGUAGE:CUDA>:${code}>")
endfunction()

function(nibble_cuda_library)
  cmake_parse_arguments(A "" "NAME" "SRCS;LIBS;ARCHITECTURES" ${ARGN})
  if(NIBBLE_CUDA)
    add_library(${A_NAME} STATIC ${A_SRCS})
    _nibble_cuda_configure(${A_NAME} LIBS ${A_LIBS} ARCHITECTURES ${A_ARCHITECTURES})
  endif()
endfunction()

function(nibble_cuda_binary)
  cmake_parse_arguments(A "" "NAME" "SRCS;LIBS;ARCHITECTURES" ${ARGN})
  if(NIBBLE_CUDA)
    add_executable(${A_NAME} ${A_SRCS})
    _nibble_cuda_configure(${A_NAME} LIBS ${A_LIBS} ARCHITECTURES ${A_ARCHITECTURES})
  endif()
endfunction()
