// The unit epilogue: the end of a time step for some rows of one vector of units. It has the activations, the update of
// the state and the stores.
//
// It also handles some vectors of units of one row. The strides then lead from vector to vector instead of row to row.

template <class E, Cell kCell>
struct CellRows {
  using C = ComputeOf<E>;
  int rows;
  int units;  // fewer than kLanes in the last vector
  bool relu;
  int64_t hidden;  // H: from plane to plane of `saved`
  const C* gates;  // [rows, gate] W_hh h
  int64_t gates_stride;
  const C* ahead;  // [rows, gate] what is to be added: W_ih x + bias
  int64_t ahead_stride;
  int64_t gate_stride;             // of both
  const C* bias_hidden = nullptr;  // GRU: b_hh of n
  const E* h_prev;
  int64_t h_stride;
  E* next;  // the next step's h, or the input of the whole-row epilogue
  int64_t next_stride;
  E* output;  // null: the whole-row epilogue writes it
  int64_t output_stride;
  C* c = nullptr;      // LSTM: updated in place
  E* saved = nullptr;  // kSave: [rows, plane, hidden] activated gates
  C* cells = nullptr;  // kSave, LSTM: [rows, hidden] c
  int64_t c_stride;
  int64_t saved_stride;
  int64_t bias_stride = 0;
};

// The pointers of `at` advance by a row. `at` is a copy: the compiler would have to assume that the stores change a
// reference. Reloading its pointers took longer than the arithmetic, which waits on latency.
template <bool kFull, bool kSave, class E, Cell kCell>
void run_rows(CellRows<E, kCell> at) {
  using S = Simd<ComputeOf<E>>;
  using V = typename S::V;
  using Math = CellMath<S>;
  const int units = at.units;
  const auto load = [&](auto* p) { return load_part<kFull>(p, units); };
  const auto store = [&](auto* p, V value) { store_part<kFull>(p, value, units); };
  const int64_t gate = at.gate_stride, plane = at.hidden;
  for (int m = 0; m < at.rows; ++m) {
    const ComputeOf<E>*const gates = at.gates, *const ahead = at.ahead;
    V h;
    if constexpr (kCell == Cell::kGru) {
      V r = S::load(gates) + S::load(ahead), z = S::load(gates + gate) + S::load(ahead + gate);
      V n = S::load(ahead + 2 * gate);
      const V hn = S::load(gates + 2 * gate) + S::load(at.bias_hidden);
      h = Math::gru_forward(r, z, n, hn, load(at.h_prev));
      if constexpr (kSave) {
        store(at.saved, r);
        store(at.saved + plane, z);
        store(at.saved + 2 * plane, n);
        store(at.saved + 3 * plane, hn);
      }
    } else if constexpr (kCell == Cell::kLstm) {
      V c = load(at.c);
      V i = S::load(gates) + S::load(ahead), f = S::load(gates + gate) + S::load(ahead + gate);
      V g = S::load(gates + 2 * gate) + S::load(ahead + 2 * gate);
      V o = S::load(gates + 3 * gate) + S::load(ahead + 3 * gate);
      h = kSave ? Math::lstm_forward(i, f, g, o, c) : Math::lstm_infer(i, f, g, o, c);
      store(at.c, c);
      if constexpr (kSave) {
        store(at.saved, i);
        store(at.saved + plane, f);
        store(at.saved + 2 * plane, g);
        store(at.saved + 3 * plane, o);
        store(at.cells, c);
      }
    } else {
      h = Math::rnn_forward(S::load(gates) + S::load(ahead), at.relu);
    }
    store(at.next, h);
    if (at.output) store(at.output, h);
    at.gates += at.gates_stride;
    at.ahead += at.ahead_stride;
    at.h_prev += at.h_stride;
    at.next += at.next_stride;
    if (at.output) at.output += at.output_stride;
    at.c += at.c_stride;
    at.saved += at.saved_stride;
    at.bias_hidden += at.bias_stride;
    at.cells += at.c_stride;
  }
}
