// How backward cuts time into stretches of steps, and where the rows of a stretch are kept.
//
// The walk is backward, and all stretches use the same memory. A stretch stores its latest step right after the next
// stretch's earliest one, because it needs that one. This takes stretches of at least two steps.

class Stretches {
 public:
  // Stretches of nearly equal numbers of rows: about `limit` rows each, but at least two steps.
  Stretches(const Schedule& schedule, int64_t limit)
      : schedule_(schedule), wanted_(std::max<int64_t>(1, ceil_div(schedule.total, limit))) {
    for (int64_t first = 0; first < schedule.steps; ++count_) {
      const int64_t end = end_of(count_, first);
      kept_rows_ = std::max(kept_rows_, row_of(end) - row_of(first));
      first = end;
    }
  }

  void take_arrays(Workspace& workspace) {
    first_ = workspace.take<int64_t>(count_ + 1);
    kept_ = workspace.take<int64_t>(schedule_.steps);
    if (!first_) return;
    first_[0] = 0;
    for (int64_t stretch = 0; stretch < count_; ++stretch) {
      const int64_t first = first_[stretch], end = first_[stretch + 1] = end_of(stretch, first);
      for (int64_t t = first; t < end; ++t) kept_[t] = row_of(t) - row_of(first);
    }
  }

  int64_t count() const { return count_; }
  int64_t kept_rows() const { return kept_rows_; }
  // Where the first row of time t is kept, in rows.
  int64_t kept(int64_t t) const { return kept_[t]; }
  Range steps(int64_t stretch) const { return {first_[stretch], first_[stretch + 1]}; }
  Range rows(int64_t stretch) const { return {row_of(first_[stretch]), row_of(first_[stretch + 1])}; }

 private:
  int64_t row_of(int64_t t) const { return t < schedule_.steps ? schedule_.offset[t] : schedule_.total; }
  int64_t end_of(int64_t stretch, int64_t first) const {
    const int64_t last_row = (stretch + 1) * schedule_.total / wanted_;
    int64_t end = std::min(first + 2, schedule_.steps);
    while (end < schedule_.steps && schedule_.offset[end] < last_row) ++end;
    return end;
  }

  const Schedule& schedule_;
  const int64_t wanted_;
  int64_t count_ = 0, kept_rows_ = 0;
  int64_t *first_ = nullptr, *kept_ = nullptr;
};
