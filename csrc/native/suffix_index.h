// The longest suffix of a text that occurred in it before, as the text grows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace specdec {

// A suffix automaton (Blumer et al., 1985): linear in the text, a few steps for every token. The state reached by the
// whole text links to the longest suffix that also ends somewhere earlier.
class SuffixIndex {
 public:
  using Token = int32_t;

  void append(Token token) {
    const int32_t current = add({states_[size_t(last_)].length + 1, 0, int64_t(text_.size()), {}});
    text_.push_back(token);
    int32_t state = last_;
    while (state != -1 && follow(state, token) == -1) {
      lead(state, token, current);
      state = states_[size_t(state)].link;
    }
    if (state != -1) states_[size_t(current)].link = suffix_state(state, token);
    last_ = current;
  }

  // (length of the longest suffix that occurred before, index just after its first occurrence).
  std::pair<int64_t, int64_t> match() const {
    if (text_.empty()) return {0, 0};
    const State& state = states_[size_t(states_[size_t(last_)].link)];
    return {state.length, state.end + 1};
  }

  // What followed that occurrence: `count` tokens, a repetition going on past the end of the text.
  std::vector<Token> continuation(int64_t count) const {
    const int64_t start = match().second, period = int64_t(text_.size()) - start;
    std::vector<Token> tokens;
    for (int64_t i = 0; i < count && period > 0; ++i) tokens.push_back(text_[size_t(start + i % period)]);
    return tokens;
  }

  // What followed a suffix of the text and of tokens `ahead` of it, wherever it occurred in the text: each token once,
  // with the length of the longest such suffix, longer ones first.
  std::pair<std::vector<Token>, std::vector<int64_t>> followers(const std::vector<Token>& ahead) const {
    int32_t state = last_;
    int64_t length = size();
    for (const Token token : ahead) {
      while (state > 0 && follow(state, token) == -1) {
        state = states_[size_t(state)].link;
        length = states_[size_t(state)].length;
      }
      if (const int32_t next = follow(state, token); next != -1) {
        state = next;
        ++length;
      }
    }
    std::vector<Token> tokens;
    std::vector<int64_t> lengths;
    for (; state > 0; state = states_[size_t(state)].link, length = states_[size_t(state)].length)
      for (const Token token : states_[size_t(state)].tokens)
        if (std::find(tokens.begin(), tokens.end(), token) == tokens.end()) {
          tokens.push_back(token);
          lengths.push_back(length);
        }
    return {std::move(tokens), std::move(lengths)};
  }

  int64_t size() const { return int64_t(text_.size()); }

 private:
  struct State {
    int64_t length;
    int32_t link;
    int64_t end;                // where the state's strings ended first
    std::vector<Token> tokens;  // that lead on from here
  };

  int32_t add(State state) {
    states_.push_back(std::move(state));
    return int32_t(states_.size()) - 1;
  }

  // The state with all of `state`'s strings followed by `token` and no longer ones: split off where there is none.
  int32_t suffix_state(int32_t state, Token token) {
    const int32_t follower = follow(state, token);
    const int64_t length = states_[size_t(state)].length + 1;
    if (states_[size_t(follower)].length == length) return follower;
    const State copied = states_[size_t(follower)];
    const int32_t clone = add({length, copied.link, copied.end, {}});
    for (const Token t : copied.tokens) lead(clone, t, follow(follower, t));
    for (; state != -1 && follow(state, token) == follower; state = states_[size_t(state)].link)
      next_[key(state, token)] = clone;
    states_[size_t(follower)].link = clone;
    return clone;
  }

  static uint64_t key(int32_t state, Token token) { return uint64_t(uint32_t(state)) << 32 | uint32_t(token); }

  int32_t follow(int32_t state, Token token) const {
    const auto found = next_.find(key(state, token));
    return found == next_.end() ? -1 : found->second;
  }

  void lead(int32_t state, Token token, int32_t to) {
    next_[key(state, token)] = to;
    states_[size_t(state)].tokens.push_back(token);
  }

  std::vector<Token> text_;
  std::vector<State> states_{{0, -1, -1, {}}};
  std::unordered_map<uint64_t, int32_t> next_;
  int32_t last_ = 0;
};

}  // namespace specdec
