// A second device without hardware: host memory under another device name, for what a library must get right about
// devices. Every operator runs its CPU kernel on the same memory, and tensors of two devices may not meet in one.

#include <ATen/core/Tensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <map>

namespace {

const c10::Device kHere(c10::kPrivateUse1, 0);
const c10::Stream kStream(c10::Stream::DEFAULT, kHere);
int64_t allocated = 0, peak = 0;

struct Held {  // what a pointer of this device keeps alive
  c10::DataPtr host;
  int64_t bytes;
};

c10::DataPtr relabelled(c10::DataPtr host, int64_t bytes) {
  void* data = host.get();
  allocated += bytes;
  peak = std::max(peak, allocated);
  auto free = [](void* held) {
    allocated -= static_cast<Held*>(held)->bytes;
    delete static_cast<Held*>(held);
  };
  return {data, new Held{std::move(host), bytes}, free, kHere};
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    return relabelled(c10::GetCPUAllocator()->allocate(bytes), static_cast<int64_t>(bytes));
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} allocator;
REGISTER_ALLOCATOR(c10::kPrivateUse1, &allocator)

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::kPrivateUse1> {
  c10::Device exchangeDevice(c10::Device) const override { return kHere; }
  c10::Device getDevice() const override { return kHere; }
  c10::Stream getStream(c10::Device) const noexcept override { return kStream; }
  c10::Stream getNewStream(c10::Device, int) const override { return kStream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return kStream; }
  void synchronizeDevice(c10::DeviceIndex) const override {}
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// The random state of the device, apart from the CPU's.
at::Generator& generator() {
  static at::Generator made = at::detail::createCPUGenerator(1);
  return made;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
} hooks;

bool is_here(const at::Tensor& tensor) { return tensor.defined() && tensor.is_privateuseone(); }

// One call of an operator: its arguments as CPU tensors over the same memory, and back.
class Call {
 public:
  explicit Call(const c10::OperatorHandle& op) : schema_(op.schema()) {
    // as on CUDA, what is indexed with may lie on the CPU
    index_ = schema_.name().find("index") != std::string::npos;
  }

  at::Tensor to_host(const at::Tensor& tensor) {
    if (!is_here(tensor)) {
      if (tensor.defined() && tensor.dim() > 0) elsewhere_ = true;
      return tensor;
    }
    here_ = true;
    auto* impl = tensor.unsafeGetTensorImpl();
    for (auto& [host, device] : tensors_)
      if (device.unsafeGetTensorImpl() == impl) return host;
    auto& entry = storages_[tensor.storage().unsafeGetStorageImpl()];
    if (!entry) {
      auto bytes = tensor.storage().nbytes();
      entry = c10::Storage(c10::Storage::use_byte_size_t(), bytes,
                           c10::DataPtr(tensor.storage().mutable_data(), c10::kCPU), c10::GetCPUAllocator(), true);
    }
    auto host = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(entry), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
    host.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    tensors_.emplace_back(host, tensor);
    return host;
  }

  c10::IValue to_host(const c10::IValue& value, const std::string& type) {
    if (value.isTensor()) return to_host(value.toTensor());
    if (value.isTensorList()) {
      std::vector<at::Tensor> hosts;
      for (const at::Tensor& tensor : value.toTensorVector()) hosts.push_back(to_host(tensor));
      return hosts;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> hosts;
      for (std::optional<at::Tensor> tensor : value.toOptionalTensorList())
        hosts.push_back(tensor ? std::optional(index_ && !is_here(*tensor) ? *tensor : to_host(*tensor)) : tensor);
      return hosts;
    }
    if (value.isDevice() && value.toDevice().is_privateuseone()) {
      here_ = true;
      return c10::Device(c10::kCPU);
    }
    if (value.isGenerator()) TORCH_CHECK(false, schema_.name(), ": this device takes no generator of the CPU");
    if (value.isNone() && type == "Generator?") return generator();
    return value;
  }

  void check() const {
    TORCH_CHECK(!(here_ && elsewhere_), schema_.name(), ": expected all tensors on one device, got second:0 and cpu");
  }

  // Operators that resize or move an argument do it to the CPU tensor.
  void write_back() {
    for (auto& [device, host] : storages_) {
      if (host.data() == device->data()) continue;
      auto bytes = host.nbytes();
      auto moved = host.set_data_ptr(c10::DataPtr(nullptr, c10::kCPU));
      device->set_data_ptr_noswap(relabelled(std::move(moved), static_cast<int64_t>(bytes)));
      device->set_nbytes(bytes);
    }
    for (auto& [host, device] : tensors_)
      if (host.sizes() != device.sizes() || host.strides() != device.strides())
        device.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }

  at::Tensor to_device(const at::Tensor& host) {
    if (!host.defined()) return host;
    for (auto& [alias, device] : tensors_)
      if (alias.unsafeGetTensorImpl() == host.unsafeGetTensorImpl()) return device;
    c10::Storage storage;
    for (auto& [device, alias] : storages_)
      if (alias.unsafeGetStorageImpl() == host.storage().unsafeGetStorageImpl())
        storage = c10::Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(device));
    if (!storage) {
      auto bytes = host.storage().nbytes();
      auto* kept = new c10::Storage(host.storage());
      c10::DataPtr data(kept->mutable_data(), kept, [](void* held) { delete static_cast<c10::Storage*>(held); }, c10::kCPU);
      storage = c10::Storage(c10::Storage::use_byte_size_t(), bytes,
                             relabelled(std::move(data), static_cast<int64_t>(bytes)), &allocator, true);
    }
    auto made = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), host.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    return made;
  }

  c10::IValue to_device(const c10::IValue& value) {
    if (value.isTensor()) return to_device(value.toTensor());
    if (!value.isTensorList()) return value;
    std::vector<at::Tensor> made;
    for (const at::Tensor& tensor : value.toTensorVector()) made.push_back(to_device(tensor));
    return made;
  }

 private:
  const c10::FunctionSchema& schema_;
  bool index_ = false, here_ = false, elsewhere_ = false;
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;  // of the CPU, of this device
  std::map<c10::StorageImpl*, c10::Storage> storages_;
};

void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call call(op);
  const auto& arguments = op.schema().arguments();
  const auto begin = stack->size() - arguments.size();
  const std::vector<c10::IValue> given(stack->begin() + static_cast<int64_t>(begin), stack->end());  // kept alive
  for (size_t i = 0; i < arguments.size(); ++i)
    (*stack)[begin + i] = call.to_host(given[i], arguments[i].type()->repr_str());
  call.check();
  op.callBoxed(stack);
  call.write_back();
  for (size_t i = begin; i < stack->size(); ++i) (*stack)[i] = call.to_device((*stack)[i]);
}

at::Tensor host_view(const at::Tensor& tensor) {
  if (!is_here(tensor)) return tensor;
  c10::Storage host(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(),
                    c10::DataPtr(tensor.storage().mutable_data(), c10::kCPU), c10::GetCPUAllocator(), false);
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(host), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return made;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool) {
  host_view(to).copy_(host_view(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Tensor& set_source(at::Tensor& self, c10::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                       c10::SymIntArrayRef stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(std::move(source));
  self.unsafeGetTensorImpl()->set_sizes_and_strides(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  return self;
}

at::Tensor& set_storage(at::Tensor& self, c10::Storage source) {
  auto size = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return set_source(self, std::move(source), 0, {c10::SymInt(size)}, {c10::SymInt(1)});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_source(self, source.storage(), source.storage_offset(), source.sym_sizes(), source.sym_strides());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &set_source);
  m.impl("set_.source_Tensor", &set_tensor);
}

TORCH_LIBRARY(second_device, m) {
  m.def("random_state() -> Tensor", [] { return generator().get_state(); });
  m.def("set_random_state(Tensor state) -> ()", [](const at::Tensor& state) { generator().set_state(state); });
  m.def("seed(int seed) -> ()", [](int64_t seed) { generator().set_current_seed(static_cast<uint64_t>(seed)); });
  m.def("memory() -> (int, int)", [] { return std::make_tuple(allocated, peak); });
  m.def("forget_peak() -> ()", [] { peak = allocated; });
}

const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

}  // namespace
