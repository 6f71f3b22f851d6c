#include "torch_binding.h"
#include "registration.h"

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, library) { library.def("scale_(Tensor(a!) x) -> ()"); }

#if defined(CPU_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, library) { library.impl("scale_", TORCH_BOX(&scale)); }
#elif defined(CUDA_KERNEL)
STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, library) { library.impl("scale_", TORCH_BOX(&scale)); }
#endif

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
