// A model and its steps as Python calls them.
#include "doors.h"
#include "forward.h"

using namespace slingshot;

namespace {

struct AnyModel {
    LEVEL::Model<float>* floats = nullptr;
    LEVEL::Model<bf16>* halves = nullptr;
};

}  // namespace

// A model whose activations are bf16 or float, without weights yet; bits of every layer, the MTP module's last.
using Handle = void*;
extern "C" Handle DOOR(new_model)(const ModelShape* shape, const LayerBits* bits, int is_bf16) {
    AnyModel* model = new AnyModel;
    if (is_bf16)
        model->halves = new LEVEL::Model<bf16>(*shape, bits);
    else
        model->floats = new LEVEL::Model<float>(*shape, bits);
    return model;
}

extern "C" void DOOR(refresh_model)(void* handle, const ModelTensors* tensors, int first, int last, int threads) {
    AnyModel* model = static_cast<AnyModel*>(handle);
    model->halves ? model->halves->refresh(*tensors, first, last, threads)
                  : model->floats->refresh(*tensors, first, last, threads);
}

extern "C" void DOOR(run_step)(void* handle, const Step* step) {
    AnyModel* model = static_cast<AnyModel*>(handle);
    model->halves ? LEVEL::forward(*model->halves, *step) : LEVEL::forward(*model->floats, *step);
}

extern "C" void DOOR(run_chain)(void* handle, Chain* chain) {
    AnyModel* model = static_cast<AnyModel*>(handle);
    model->halves ? LEVEL::run_chain(*model->halves, *chain) : LEVEL::run_chain(*model->floats, *chain);
}

extern "C" void DOOR(free_model)(void* handle) {
    AnyModel* model = static_cast<AnyModel*>(handle);
    delete model->floats;
    delete model->halves;
    delete model;
}
