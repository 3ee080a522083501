// The only binding file: problems are plain structs, pointers and streams are integers. It is built
// without PyTorch's headers; tensors.h reads tensors through PyTorch's stable C interface.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/launch.h"
#include "../cuda/launch.h"
#include "afd/problem.h"
#include "tensors.h"

namespace py = pybind11;

namespace {

using Pointer = uintptr_t;
using afd::tensors::define_place;
using Nogil = py::call_guard<py::gil_scoped_release>;

// A field that Python sees as the integer value of a pointer.
template <class Problem, class T>
void pointer(py::class_<Problem>& type, const char* name, T* Problem::* field) {
  type.def_property(
      name, [field](const Problem& p) { return reinterpret_cast<Pointer>(p.*field); },
      [field](Problem& p, Pointer value) { p.*field = reinterpret_cast<T*>(value); });
}

// A field of rows or schedule, shown as the problem's own.
template <class Problem, class Part, class T>
void part(py::class_<Problem>& type, const char* name, Part Problem::* owner, T Part::* field) {
  type.def_property(
      name, [=](const Problem& p) { return p.*owner.*field; },
      [=](Problem& p, T value) { p.*owner.*field = value; });
}

template <class Problem>
void type_code(py::class_<Problem>& type, const char* name, afd::DType Problem::* field) {
  type.def_property(
      name, [field](const Problem& p) { return static_cast<int>(p.*field); },
      [field](Problem& p, int value) { p.*field = static_cast<afd::DType>(value); });
}

template <class Problem>
py::class_<Problem> problem(py::module_& m, const char* name) {
  py::class_<Problem> type(m, name, py::module_local());
  type.def(py::init([] { return Problem{}; }));
  part(type, "batch", &Problem::rows, &afd::Rows::batch);
  part(type, "outer", &Problem::rows, &afd::Rows::outer);
  part(type, "frames", &Problem::rows, &afd::Rows::frames);
  part(type, "inner", &Problem::rows, &afd::Rows::inner);
  part(type, "t_chunks", &Problem::rows, &afd::Rows::t_chunks);
  part(type, "schedule", &Problem::schedule, &afd::Schedule::kind);
  part(type, "beta_min", &Problem::schedule, &afd::Schedule::beta_min);
  part(type, "beta_max", &Problem::schedule, &afd::Schedule::beta_max);
  type_code(type, "x0_type", &Problem::x0_type);
  type_code(type, "noise_type", &Problem::noise_type);
  pointer(type, "x0", &Problem::x0);
  pointer(type, "t", &Problem::t);
  pointer(type, "seed", &Problem::seed);
  pointer(type, "noise", &Problem::noise);
  return type;
}

// Token rows as Python sees them: (pointer, batch stride, token stride).
template <class Problem>
void rows(py::class_<Problem>& type, const char* name, afd::TokenRows Problem::* field) {
  using Value = std::tuple<Pointer, int64_t, int64_t>;
  type.def_property(
      name,
      [field](const Problem& p) {
        const afd::TokenRows& rows = p.*field;
        return Value(reinterpret_cast<Pointer>(rows.data), rows.batch, rows.token);
      },
      [field](Problem& p, Value value) {
        const auto [data, batch, token] = value;
        p.*field = {reinterpret_cast<const void*>(data), batch, token};
      });
}

// Frame rows: (pointer, type, batch stride, frame stride, batches, frames).
void rows(py::class_<afd::AdalnProblem>& type, const char* name,
          afd::FrameRows afd::AdalnProblem::* field) {
  using Value = std::tuple<Pointer, int, int64_t, int64_t, int64_t, int64_t>;
  type.def_property(
      name,
      [field](const afd::AdalnProblem& p) {
        const afd::FrameRows& rows = p.*field;
        return Value(reinterpret_cast<Pointer>(rows.data), static_cast<int>(rows.type), rows.batch,
                     rows.frame, rows.batches, rows.frames);
      },
      [field](afd::AdalnProblem& p, Value value) {
        const auto [data, code, batch, frame, batches, frames] = value;
        p.*field = {reinterpret_cast<const void*>(data),
                    static_cast<afd::DType>(code),
                    batch,
                    frame,
                    batches,
                    frames};
      });
}

void define_qk_norm_rope(py::module_& m) {
  using Problem = afd::QkNormRopeProblem;
  py::class_<Problem> type(m, "QkNormRopeProblem", py::module_local());
  type.def(py::init([] { return Problem{}; }));
  type.def_readwrite("batch", &Problem::batch);
  type.def_readwrite("tokens", &Problem::tokens);
  type.def_readwrite("heads", &Problem::heads);
  type.def_readwrite("head_dim", &Problem::head_dim);
  type.def_readwrite("eps", &Problem::eps);
  type.def_readwrite("rope_batch", &Problem::rope_batch);
  type.def_readwrite("positions", &Problem::positions);
  type.def_readwrite("slots", &Problem::slots);
  type.def_readwrite("tokens_per_frame", &Problem::tokens_per_frame);
  type.def_readwrite("sink_frames", &Problem::sink_frames);
  type_code(type, "type", &Problem::type);
  type_code(type, "weight_type", &Problem::weight_type);
  rows(type, "q", &Problem::q);
  rows(type, "k", &Problem::k);
  rows(type, "v", &Problem::v);
  rows(type, "grad_q", &Problem::grad_q);
  rows(type, "grad_k", &Problem::grad_k);
  pointer(type, "weight_q", &Problem::weight_q);
  pointer(type, "weight_k", &Problem::weight_k);
  pointer(type, "rope", &Problem::rope);
  pointer(type, "q_out", &Problem::q_out);
  pointer(type, "k_out", &Problem::k_out);
  pointer(type, "k_cache", &Problem::k_cache);
  pointer(type, "v_cache", &Problem::v_cache);
  pointer(type, "position", &Problem::position);
  pointer(type, "dq", &Problem::dq);
  pointer(type, "dk", &Problem::dk);
  pointer(type, "dweight_q", &Problem::dweight_q);
  pointer(type, "dweight_k", &Problem::dweight_k);
  define_place(type, "place", &Problem::q, &Problem::k, &Problem::v, &Problem::weight_q,
               &Problem::weight_k, &Problem::rope, &Problem::k_cache, &Problem::v_cache,
               &Problem::position, &Problem::q_out, &Problem::k_out);
  define_place(type, "place_bwd", &Problem::grad_q, &Problem::grad_k, &Problem::q, &Problem::k,
               &Problem::weight_q, &Problem::weight_k, &Problem::rope, &Problem::dq, &Problem::dk,
               &Problem::dweight_q, &Problem::dweight_k);
  m.def("qk_norm_rope_cpu", afd::cpu::launch_qk_norm_rope, Nogil());
  m.def("qk_norm_rope_bwd_cpu", afd::cpu::launch_qk_norm_rope_bwd, Nogil());
}

void define_adaln(py::module_& m) {
  using Problem = afd::AdalnProblem;
  py::class_<Problem> type(m, "AdalnProblem", py::module_local());
  type.def(py::init([] { return Problem{}; }));
  type.def_readwrite("batch", &Problem::batch);
  type.def_readwrite("tokens", &Problem::tokens);
  type.def_readwrite("channels", &Problem::channels);
  type.def_readwrite("scale_offset", &Problem::scale_offset);
  type.def_readwrite("eps", &Problem::eps);
  type_code(type, "type", &Problem::type);
  rows(type, "x", &Problem::x);
  rows(type, "branch", &Problem::branch);
  rows(type, "gate", &Problem::gate);
  rows(type, "scale", &Problem::scale);
  rows(type, "shift", &Problem::shift);
  rows(type, "grad_x_out", &Problem::grad_x_out);
  rows(type, "grad_h", &Problem::grad_h);
  pointer(type, "x_out", &Problem::x_out);
  pointer(type, "h", &Problem::h);
  pointer(type, "dx", &Problem::dx);
  pointer(type, "dbranch", &Problem::dbranch);
  pointer(type, "dgate", &Problem::dgate);
  pointer(type, "dscale", &Problem::dscale);
  pointer(type, "dshift", &Problem::dshift);
  define_place(type, "place", &Problem::x, &Problem::branch, &Problem::gate, &Problem::scale,
               &Problem::shift, &Problem::x_out, &Problem::h);
  define_place(type, "place_bwd", &Problem::grad_x_out, &Problem::grad_h, &Problem::x,
               &Problem::branch, &Problem::gate, &Problem::scale, &Problem::dx, &Problem::dbranch,
               &Problem::dgate, &Problem::dscale, &Problem::dshift);
  m.def("adaln_cpu", afd::cpu::launch_adaln, Nogil());
  m.def("adaln_bwd_cpu", afd::cpu::launch_adaln_bwd, Nogil());
}

#ifdef AFD_WITH_CUDA
// An op on token rows, and its gradient, which needs scratch memory.
template <class Problem>
void cuda_rows(py::module_& m, const std::string& name, void (*forward)(const Problem&, void*),
               int64_t (*workspace)(const Problem&),
               void (*backward)(const Problem&, void*, void*)) {
  m.def((name + "_cuda").c_str(), [forward](const Problem& p, Pointer stream) {
    forward(p, reinterpret_cast<void*>(stream));
  });
  m.def((name + "_bwd_workspace").c_str(), workspace, "Bytes of scratch memory.");
  m.def((name + "_bwd_cuda").c_str(),
        [backward](const Problem& p, Pointer scratch, Pointer stream) {
          backward(p, reinterpret_cast<void*>(scratch), reinterpret_cast<void*>(stream));
        });
}

void define_cuda_rows(py::module_& m) {
  using namespace afd::cuda;
  cuda_rows(m, "qk_norm_rope", launch_qk_norm_rope, qk_norm_rope_bwd_workspace,
            launch_qk_norm_rope_bwd);
  cuda_rows(m, "adaln", launch_adaln, adaln_bwd_workspace, launch_adaln_bwd);
}
#endif

std::vector<std::string> isas() {
  const char* names[3];
  const int count = afd::supported_isas(names);
  return {names, names + count};
}

std::vector<uint32_t> philox(std::vector<uint32_t> counter, uint32_t key_low, uint32_t key_high) {
  counter.resize(4);
  afd::philox4x32_10(counter[0], counter[1], counter[2], counter[3], {key_low, key_high});
  return counter;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled core of afd_kernels; use it through afd_kernels.native.";

  auto noise = problem<afd::NoiseProblem>(m, "NoiseProblem");
  using Noise = afd::NoiseProblem;
  pointer(noise, "x_t", &Noise::x_t);
  define_place(noise, "place", &Noise::x0, &Noise::t, &Noise::seed, &Noise::noise, &Noise::x_t);

  using Nft = afd::NftProblem;
  auto nft = problem<Nft>(m, "NftProblem");
  nft.def_readwrite("r_chunks", &Nft::r_chunks);
  nft.def_readwrite("sigma_chunks", &Nft::sigma_chunks);
  nft.def_readwrite("groups", &Nft::groups);
  nft.def_readwrite("nft_beta", &Nft::nft_beta);
  nft.def_readwrite("prior_weight", &Nft::prior_weight);
  nft.def_readwrite("scale", &Nft::scale);
  nft.def_readwrite("slope", &Nft::slope);
  nft.def_readwrite("weight_min", &Nft::weight_min);
  nft.def_readwrite("grad_power", &Nft::grad_power);
  nft.def_readwrite("adaptive", &Nft::adaptive);
  nft.def_readwrite("x0_space", &Nft::x0_space);
  nft.def_readwrite("prior_in_x0", &Nft::prior_in_x0);
  nft.def_readwrite("prior_by_r", &Nft::prior_by_r);
  type_code(nft, "prediction_type", &Nft::prediction_type);
  pointer(nft, "v_theta", &Nft::v_theta);
  pointer(nft, "v_old", &Nft::v_old);
  pointer(nft, "v_ref", &Nft::v_ref);
  pointer(nft, "r", &Nft::r);
  pointer(nft, "frame_mask", &Nft::frame_mask);
  pointer(nft, "sigma", &Nft::sigma);
  pointer(nft, "prior_weights", &Nft::prior_weights);
  pointer(nft, "sample_weight", &Nft::sample_weight);
  pointer(nft, "loss", &Nft::loss);
  pointer(nft, "metrics", &Nft::metrics);
  pointer(nft, "grad", &Nft::grad);
  define_place(nft, "place", &Nft::v_theta, &Nft::v_old, &Nft::v_ref, &Nft::x0, &Nft::t, &Nft::r,
               &Nft::seed, &Nft::noise, &Nft::frame_mask, &Nft::sigma, &Nft::prior_weights,
               &Nft::sample_weight, &Nft::loss, &Nft::metrics, &Nft::grad);

  define_qk_norm_rope(m);
  define_adaln(m);
  afd::tensors::define(m);

  m.def("isas", isas, "The instruction sets this CPU can run, narrowest first.");
  m.def("isa", [] { return std::string(afd::cpu_kernels().name); }, "The one in use.");
  m.def("use_isa", [](const std::string& name) { return afd::use_isa(name.c_str()); });
  m.def("philox", philox, "Philox4x32-10 of four counter words.", py::arg("counter"),
        py::arg("key_low"), py::arg("key_high"));
  m.def(
      "normals",
      [](int64_t seed, int64_t first, int64_t count, Pointer out) {
        afd::cpu::launch_normals(seed, first, count, reinterpret_cast<float*>(out));
      },
      Nogil(), py::arg("seed"), py::arg("first"), py::arg("count"), py::arg("out"));
  m.def("forward_noise_cpu", afd::cpu::launch_forward_noise, Nogil());
  m.def("forward_noise_bwd_cpu", afd::cpu::launch_forward_noise_bwd, Nogil());
  m.def("nft_loss_cpu", afd::cpu::launch_nft_loss, Nogil());
  m.def(
      "scale_cpu",
      [](int type, Pointer in, Pointer out, int64_t count, float factor, int threads) {
        afd::cpu::launch_scale(static_cast<afd::DType>(type), reinterpret_cast<const void*>(in),
                               reinterpret_cast<void*>(out), count, factor, threads);
      },
      Nogil());
  m.def(
      "stream_5r1w",
      [](const std::vector<Pointer>& in, Pointer out, int64_t count, bool non_temporal,
         int threads) {
        const float* arrays[5];
        for (size_t i = 0; i < 5; ++i) {
          arrays[i] = reinterpret_cast<const float*>(in.at(i));
        }
        afd::cpu::launch_stream_5r1w(arrays, reinterpret_cast<float*>(out), count, non_temporal,
                                     threads);
      },
      Nogil());

  // Where element `position` of sample `sample` lies: the index arithmetic of every kernel.
  m.def(
      "locate",
      [](int64_t outer, int64_t frames, int64_t inner, int64_t sample, int64_t position) {
        const afd::Rows rows = {sample + 1, outer, frames, inner, 1};
        return py::make_tuple(afd::element_offset(rows, sample, position),
                              afd::frame_of_position(rows, position));
      },
      "(offset, frame) of an element, for the test of the index arithmetic.");

  m.attr("cuda_most_channels") = afd::cuda::kMostChannels;
#ifdef AFD_WITH_CUDA
  m.attr("cuda_archs") = AFD_CUDA_ARCHS;
  define_cuda_rows(m);
  m.def("cuda_unusable", afd::cuda::unusable,
        "Why the current CUDA device cannot run the kernels, or None.");
  m.def("forward_noise_cuda", [](const afd::NoiseProblem& p, Pointer stream) {
    afd::cuda::launch_forward_noise(p, reinterpret_cast<void*>(stream));
  });
  m.def("forward_noise_bwd_cuda", [](const afd::NoiseProblem& p, Pointer stream) {
    afd::cuda::launch_forward_noise_bwd(p, reinterpret_cast<void*>(stream));
  });
  m.def("nft_loss_workspace", afd::cuda::nft_loss_workspace, "Bytes of scratch memory.");
  m.def("nft_loss_cuda", [](const afd::NftProblem& p, Pointer workspace, Pointer stream) {
    afd::cuda::launch_nft_loss(p, reinterpret_cast<void*>(workspace),
                               reinterpret_cast<void*>(stream));
  });
  m.def("scale_cuda",
        [](int type, Pointer in, Pointer out, int64_t count, Pointer factor, Pointer stream) {
          afd::cuda::launch_scale(static_cast<afd::DType>(type), reinterpret_cast<const void*>(in),
                                  reinterpret_cast<void*>(out), count,
                                  reinterpret_cast<const float*>(factor),
                                  reinterpret_cast<void*>(stream));
        });
#else
  m.attr("cuda_archs") = "";
#endif
}
