//! Tables of allowed calls become seccomp programs while this crate is compiled, so a VM that starts spends nothing on it.
//!
//! A program is a binary search for the number of the call, then its conditions. That matters at start too: the kernel runs
//! every new program once for each call number that exists, to find those that need no look at their arguments.
//!
//! ```text
//!   ld arch ─► not x86-64: kill
//!   ld nr ─► jge middle ─┬─► jge … ─► jeq number ─► conditions ─► allow
//!                        └─► jge … ─► jeq number ─► conditions ─► trap
//! ```

use libc::sock_filter;

use super::filters::{Only, Row};

/// Most instructions of one program.
const INSTRUCTIONS_MAX: usize = 1024;
/// Most different calls in the tables of one program.
const CALLS_MAX: usize = 256;

// Classic BPF (Linux include/uapi/linux/bpf_common.h): load a word, jumps, return.
const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_GREATER_OR_EQUAL: u16 = 0x35;
const IF_ANY_BIT: u16 = 0x45;
pub(super) const RETURN: u16 = 0x06;

/// `AUDIT_ARCH_X86_64`.
const ARCHITECTURE: u32 = 0xC000_003E;
// `struct seccomp_data`: number, architecture, address, six arguments of 8 bytes. Only the low half of an argument is compared:
// the arguments in the tables are 32 bits wide to the kernel, or a set of low bits.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;

pub(super) const ALLOW: u32 = 0x7FFF_0000;
pub(super) const TRAP: u32 = 0x0003_0000;
pub(super) const LOG: u32 = 0x7FFC_0000;
const KILL: u32 = 0x8000_0000;

/// A program and how much of it is used.
pub(super) struct Assembler {
    code: [sock_filter; INSTRUCTIONS_MAX],
    length: usize,
}

const NOTHING: sock_filter = sock_filter { code: 0, jt: 0, jf: 0, k: 0 };

/// An error of the table ends the compilation of this crate.
#[expect(clippy::panic, reason = "evaluated by the compiler only")]
const fn demand(holds: bool) {
    if !holds {
        panic!("a table of system calls is too long, or has a number that is none");
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "checked; const code has no try_from"
)]
const fn narrow(value: i64) -> u32 {
    demand(value >= 0 && value <= u32::MAX as i64);
    value as u32
}

#[expect(clippy::cast_possible_truncation, reason = "checked; const code has no try_from")]
const fn offset(length: usize) -> u8 {
    demand(length <= 255);
    length as u8
}

#[expect(
    clippy::indexing_slicing,
    reason = "evaluated by the compiler only, which refuses what is out of bounds"
)]
impl Assembler {
    /// The program that allows what any of `tables` allows. To be used in constants only.
    pub(super) const fn compile(tables: &[&[Row]]) -> Self {
        let mut this = Self { code: [NOTHING; INSTRUCTIONS_MAX], length: 0 };
        this.emit(LOAD, 0, 0, ARCHITECTURE_AT);
        this.emit(IF_EQUAL, 1, 0, ARCHITECTURE);
        this.emit(RETURN, 0, 0, KILL);
        this.emit(LOAD, 0, 0, NUMBER_AT);
        let (numbers, count) = numbers(tables);
        demand(count > 0);
        this.search(tables, &numbers, 0, count);
        this
    }

    /// Its instructions, cut to their number.
    pub(super) const fn cut<const N: usize>(&self) -> [sock_filter; N] {
        demand(N == self.length);
        let mut code = [NOTHING; N];
        let mut at = 0;
        while at < N {
            code[at] = self.code[at];
            at += 1;
        }
        code
    }

    /// Number of its instructions.
    pub(super) const fn length(&self) -> usize {
        self.length
    }

    const fn emit(&mut self, code: u16, jt: u8, jf: u8, k: u32) {
        self.code[self.length] = sock_filter { code, jt, jf, k };
        self.length += 1;
    }

    const fn search(&mut self, tables: &[&[Row]], numbers: &[i64; CALLS_MAX], from: usize, to: usize) {
        if to - from == 1 {
            return self.call(tables, numbers[from]);
        }
        let middle = from + (to - from) / 2;
        // A conditional jump reaches 255 instructions, the other any distance.
        self.emit(IF_GREATER_OR_EQUAL, 0, 1, narrow(numbers[middle]));
        let jump = self.length;
        self.emit(JUMP, 0, 0, 0);
        self.search(tables, numbers, from, middle);
        #[expect(clippy::cast_possible_truncation, reason = "less than INSTRUCTIONS_MAX")]
        let distance = (self.length - jump - 1) as u32;
        self.code[jump].k = distance;
        self.search(tables, numbers, middle, to);
    }

    const fn call(&mut self, tables: &[&[Row]], number: i64) {
        let test = self.length;
        self.emit(IF_EQUAL, 0, 0, narrow(number));
        if unconditional(tables, number) {
            self.emit(RETURN, 0, 0, ALLOW);
        } else {
            let mut table = 0;
            while table < tables.len() {
                let mut row = 0;
                while row < tables[table].len() {
                    if tables[table][row].call == number {
                        self.alternative(tables[table][row].only);
                    }
                    row += 1;
                }
                table += 1;
            }
        }
        self.code[test].jf = offset(self.length - test - 1);
        self.emit(RETURN, 0, 0, TRAP);
    }

    /// Allows when all conditions hold; else goes on behind.
    const fn alternative(&mut self, only: &[(u8, u64, Only)]) {
        let mut at = 0;
        while at < only.len() {
            let (argument, value, how) = only[at];
            // Behind this test: two instructions for each condition that follows, and the return.
            let skip = offset(2 * (only.len() - at - 1) + 1);
            self.emit(LOAD, 0, 0, ARGUMENTS_AT + 8 * argument as u32);
            demand(value <= u32::MAX as u64);
            let value = narrow(value.cast_signed());
            match how {
                Only::Equal => self.emit(IF_EQUAL, 0, skip, value),
                Only::Without => self.emit(IF_ANY_BIT, skip, 0, value),
            }
            at += 1;
        }
        self.emit(RETURN, 0, 0, ALLOW);
    }
}

/// Whether a row allows the call whatever its arguments are.
#[expect(clippy::indexing_slicing, reason = "evaluated by the compiler only")]
const fn unconditional(tables: &[&[Row]], number: i64) -> bool {
    let mut table = 0;
    while table < tables.len() {
        let mut row = 0;
        while row < tables[table].len() {
            if tables[table][row].call == number && tables[table][row].only.is_empty() {
                return true;
            }
            row += 1;
        }
        table += 1;
    }
    false
}

/// The numbers of all calls, each once, in ascending order.
#[expect(clippy::indexing_slicing, reason = "evaluated by the compiler only")]
const fn numbers(tables: &[&[Row]]) -> ([i64; CALLS_MAX], usize) {
    let (mut sorted, mut count, mut table) = ([0; CALLS_MAX], 0, 0);
    while table < tables.len() {
        let mut row = 0;
        while row < tables[table].len() {
            let number = tables[table][row].call;
            let mut at = 0;
            while at < count && sorted[at] < number {
                at += 1;
            }
            if at == count || sorted[at] != number {
                let mut move_at = count;
                while move_at > at {
                    sorted[move_at] = sorted[move_at - 1];
                    move_at -= 1;
                }
                sorted[at] = number;
                count += 1;
            }
            row += 1;
        }
        table += 1;
    }
    (sorted, count)
}

#[cfg(test)]
mod tests {
    use super::super::filters::{IO, PAGER, SETUP, VCPU};
    use super::super::{PROGRAM_IO, PROGRAM_PAGER, PROGRAM_SETUP, PROGRAM_VCPU};
    use super::*;
    use proptest::prelude::*;

    /// Runs a program as the kernel does.
    fn decide(program: &[sock_filter], arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let jump = |condition: bool| usize::from(if condition { jt } else { jf });
            match code {
                LOAD => {
                    accumulator = match k {
                        NUMBER_AT => number,
                        ARCHITECTURE_AT => arch,
                        _ => arguments[(k - ARGUMENTS_AT) as usize / 8] as u32,
                    }
                }
                JUMP => at += k as usize,
                IF_EQUAL => at += jump(accumulator == k),
                IF_GREATER_OR_EQUAL => at += jump(accumulator >= k),
                IF_ANY_BIT => at += jump(accumulator & k != 0),
                RETURN => return k,
                _ => panic!("instruction {code:#x}"),
            }
        }
    }

    fn allowed(tables: &[&[Row]], number: u32, arguments: [u64; 6]) -> bool {
        tables.iter().copied().flatten().filter(|row| row.call == i64::from(number)).any(|row| {
            row.only.iter().all(|(argument, value, how)| match how {
                Only::Equal => arguments[usize::from(*argument)] as u32 == *value as u32,
                Only::Without => arguments[usize::from(*argument)] & value == 0,
            })
        })
    }

    fn programs() -> [(&'static [sock_filter], Vec<&'static [Row]>); 4] {
        [
            (PROGRAM_IO, vec![IO]),
            (PROGRAM_VCPU, vec![VCPU]),
            (PROGRAM_PAGER, vec![PAGER]),
            (PROGRAM_SETUP, vec![SETUP, IO, VCPU, PAGER]),
        ]
    }

    #[test]
    fn every_row_is_allowed_with_the_arguments_it_names_and_other_numbers_are_not() {
        for (program, tables) in programs() {
            for row in tables.iter().copied().flatten() {
                let mut arguments = [0; 6];
                for (argument, value, how) in row.only {
                    arguments[usize::from(*argument)] = if *how == Only::Equal { *value } else { !value };
                }
                assert_eq!(decide(program, ARCHITECTURE, row.call as u32, arguments), ALLOW, "{row:?}");
            }
            for number in (0..600).chain([1 << 30, (1 << 30) + 1, u32::MAX]) {
                let verdict = if allowed(&tables, number, [0; 6]) { ALLOW } else { TRAP };
                assert_eq!(decide(program, ARCHITECTURE, number, [0; 6]), verdict, "{number}");
            }
        }
    }

    #[test]
    fn a_call_of_another_architecture_ends_the_process() {
        for (program, _) in programs() {
            assert_eq!(decide(program, 0x4000_0003, 0, [0; 6]), KILL);
        }
    }

    proptest! {
        #[test]
        fn programs_decide_as_their_tables(row in any::<prop::sample::Index>(), flip in 0..6usize, value: u64) {
            for (program, tables) in programs() {
                let rows: Vec<&Row> = tables.iter().copied().flatten().collect();
                let row = rows[row.index(rows.len())];
                let mut arguments = [value; 6];
                for (argument, value, _) in row.only {
                    arguments[usize::from(*argument)] = *value;
                }
                for arguments in [arguments, { arguments[flip] ^= value; arguments }] {
                    let verdict = if allowed(&tables, row.call as u32, arguments) { ALLOW } else { TRAP };
                    prop_assert_eq!(decide(program, ARCHITECTURE, row.call as u32, arguments), verdict);
                }
            }
        }
    }
}
