//! Whether what clients saw of one thing can have happened in some order, one after the other, in which each request took effect
//! between its beginning and its end (Wing and Gong's search, with Lowe's memory of what was tried).

use std::collections::BTreeSet;

/// What a thing does with requests.
pub trait Model {
    /// How it is.
    type State: Clone + Ord;
    /// A request with what was answered; what is not known fits anything.
    type Op;

    /// How it may be after this request with this answer; empty when the answer is impossible.
    fn after(state: &Self::State, op: &Self::Op) -> Vec<Self::State>;
}

/// One request of a client.
#[derive(Debug, Clone)]
pub struct Call<Op> {
    /// When it began: a number that grows with each beginning and end.
    pub begin: u64,
    /// When it was answered; absent while nobody knows whether it took effect.
    pub end: Option<u64>,
    /// What was asked and answered.
    pub op: Op,
}

/// Calls that took effect, as bits.
type Done = Vec<u64>;

fn has(done: &Done, index: usize) -> bool {
    done.get(index / 64).is_some_and(|word| word & (1 << (index % 64)) != 0)
}

/// True when there is such an order, beginning with `state`. Calls without an answer may have taken effect or not.
pub fn is_linearizable<M: Model>(state: M::State, calls: &[Call<M::Op>]) -> bool {
    let mut calls: Vec<&Call<M::Op>> = calls.iter().collect();
    calls.sort_by_key(|call| call.begin);
    let words = calls.len().div_ceil(64);
    let mut seen: BTreeSet<(Done, M::State)> = BTreeSet::new();
    let mut open = vec![(vec![0; words], state)];
    while let Some((done, state)) = open.pop() {
        let left = || calls.iter().enumerate().filter(|(index, _)| !has(&done, *index));
        // Whoever began after one that is left had ended cannot come before it.
        let Some(limit) = left().filter_map(|(_, call)| call.end).min() else { return true };
        for (index, call) in left().take_while(|(_, call)| call.begin < limit) {
            for next in M::after(&state, &call.op) {
                let mut done = done.clone();
                if let Some(word) = done.get_mut(index / 64) {
                    *word |= 1 << (index % 64);
                }
                if seen.insert((done.clone(), next.clone())) {
                    open.push((done, next));
                }
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Register;

    enum Op {
        Write(u8),
        Read(u8),
    }

    impl Model for Register {
        type State = u8;
        type Op = Op;

        fn after(state: &u8, op: &Op) -> Vec<u8> {
            match op {
                Op::Write(value) => vec![*value],
                Op::Read(value) if value == state => vec![*state],
                Op::Read(_) => Vec::new(),
            }
        }
    }

    fn call(begin: u64, end: impl Into<Option<u64>>, op: Op) -> Call<Op> {
        Call { begin, end: end.into(), op }
    }

    #[test]
    fn reads_see_the_newest_write_and_one_that_is_under_way_either_way() {
        let fits = |calls: &[Call<Op>]| is_linearizable::<Register>(0, calls);
        assert!(fits(&[call(1, 2, Op::Write(1)), call(3, 4, Op::Read(1))]));
        assert!(!fits(&[call(1, 2, Op::Write(1)), call(3, 4, Op::Read(0))]), "stale");
        assert!(fits(&[call(1, 9, Op::Write(1)), call(2, 3, Op::Read(0)), call(4, 5, Op::Read(1))]));
        assert!(!fits(&[call(1, 9, Op::Write(1)), call(2, 3, Op::Read(1)), call(4, 5, Op::Read(0))]), "back");
        assert!(!fits(&[call(1, 2, Op::Read(7))]), "from nowhere");
    }

    #[test]
    fn a_write_without_an_answer_may_have_happened_later_or_never() {
        let fits = |calls: &[Call<Op>]| is_linearizable::<Register>(0, calls);
        assert!(fits(&[call(1, None, Op::Write(1)), call(2, 3, Op::Read(0)), call(4, 5, Op::Read(1))]));
        assert!(fits(&[call(1, None, Op::Write(1)), call(2, 3, Op::Read(0)), call(4, 5, Op::Read(0))]));
        let twice = [
            call(1, None, Op::Write(1)),
            call(2, 3, Op::Read(1)),
            call(4, 5, Op::Write(2)),
            call(6, 7, Op::Read(1)),
        ];
        assert!(!fits(&twice), "once only");
    }
}
