//! The 16550A serial port as vCPUs see it: registers, a bounded output buffer, a bounded input buffer.
//!
//! ```text
//!   vCPU ──THR──► output (16 KiB) ──I/O thread──► console      full: the transmitter is not empty, bytes are lost
//!   vCPU ◄──RBR── input (1 KiB)   ◄──I/O thread── console      full: the console reads no further
//! ```

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use crate::devices::ioapic::IoApic;
use crate::layout::SERIAL_PIN;
use crate::mailbox::{Mailbox, Message};
use crate::snapshot::codec::{Invalid, Reader, Writer};
use crate::times::{Moment, Times};

/// Most bytes of output that wait for the I/O thread.
pub const OUTPUT_MAX: usize = 16 << 10;
/// Most bytes of input that wait for the guest.
pub const INPUT_MAX: usize = 1 << 10;

const IER_RECEIVED: u8 = 1;
const IER_TRANSMITTER_EMPTY: u8 = 1 << 1;
const IIR_NONE: u8 = 1;
const IIR_TRANSMITTER_EMPTY: u8 = 2;
const IIR_RECEIVED: u8 = 4;
const IIR_FIFO: u8 = 0xC0;
const FCR_ENABLE: u8 = 1;
const FCR_CLEAR_INPUT: u8 = 1 << 1;
const LCR_DIVISOR: u8 = 1 << 7;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;
const LSR_DATA: u8 = 1;
const LSR_TRANSMITTER_EMPTY: u8 = 1 << 5 | 1 << 6;
/// Carrier, data set ready, clear to send.
const MSR_CONNECTED: u8 = 0xB0;

#[derive(Default)]
struct State {
    interrupts: u8,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    divisor: [u8; 2],
    fifo: bool,
    transmitter_empty_pending: bool,
    input: VecDeque<u8>,
    /// The console holds input back until there is room.
    input_wanted: bool,
    output: Vec<u8>,
    lost: u64,
}

/// The port.
pub struct Serial {
    state: Mutex<State>,
    ioapic: Arc<IoApic>,
    mailbox: Arc<Mailbox>,
    times: Arc<Times>,
}

impl Serial {
    /// A port whose interrupt goes to `ioapic` and whose news goes to `mailbox`.
    pub fn new(ioapic: Arc<IoApic>, mailbox: Arc<Mailbox>, times: Arc<Times>) -> Self {
        Self { state: Mutex::default(), ioapic, mailbox, times }
    }

    fn with<R>(&self, act: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let result = act(&mut state);
        let pending =
            state.interrupt() != IIR_NONE && state.modem_control & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2;
        self.ioapic.set_line(SERIAL_PIN, pending);
        result
    }

    /// Reads register `offset` (0 to 7).
    pub fn read(&self, offset: u16) -> u8 {
        self.with(|state| {
            let value = state.read(offset);
            if state.input_wanted && state.input.len() < INPUT_MAX / 2 {
                state.input_wanted = false;
                self.mailbox.post(Message::Serial);
            }
            value
        })
    }

    /// Writes register `offset` (0 to 7).
    pub fn write(&self, offset: u16, value: u8) {
        self.with(|state| {
            let was_empty = state.output.is_empty();
            state.write(offset, value);
            if was_empty && !state.output.is_empty() {
                self.times.note(Moment::FirstSerial);
                self.mailbox.post(Message::Serial);
            }
        });
    }

    /// Moves what the guest printed into `to`, which is empty.
    pub fn take_output(&self, to: &mut Vec<u8>) {
        self.with(|state| {
            std::mem::swap(&mut state.output, to);
            if to.len() >= OUTPUT_MAX {
                state.transmitter_empty_pending = true;
            }
        });
    }

    /// How many bytes of input fit now. When that is none the I/O thread is told as soon as there is room.
    pub fn room(&self) -> usize {
        self.with(|state| {
            let room = INPUT_MAX.saturating_sub(state.input.len());
            state.input_wanted = room == 0;
            room
        })
    }

    /// Types `bytes`, at most [`Self::room`].
    pub fn type_in(&self, bytes: &[u8]) {
        self.with(|state| {
            let room = INPUT_MAX.saturating_sub(state.input.len());
            state.input.extend(bytes.iter().take(room));
        });
    }

    /// Writes registers and typed bytes for a snapshot. What was printed belongs to the console by then.
    pub fn save(&self, to: &mut Writer) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for register in [state.interrupts, state.line_control, state.modem_control, state.scratch] {
            to.u8(register);
        }
        to.raw(&state.divisor);
        to.bool(state.fifo);
        to.bool(state.transmitter_empty_pending);
        to.bytes(&state.input.iter().copied().collect::<Vec<u8>>());
    }

    /// Takes those of a snapshot. The interrupt line is that of the I/O APIC's snapshot.
    ///
    /// # Errors
    /// It is cut off or has more typed bytes than the buffer.
    pub fn restore(&self, from: &mut Reader<'_>) -> Result<(), Invalid> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.interrupts = from.u8("IER")? & 0x0F;
        state.line_control = from.u8("LCR")?;
        state.modem_control = from.u8("MCR")? & 0x1F;
        state.scratch = from.u8("SCR")?;
        state.divisor = from.array("divisor")?;
        state.fifo = from.bool("FIFO")?;
        state.transmitter_empty_pending = from.bool("transmitter interrupt")?;
        state.input = from.bytes("typed bytes", INPUT_MAX)?.iter().copied().collect();
        Ok(())
    }

    /// Bytes that were lost because the guest did not wait for the transmitter.
    pub fn lost(&self) -> u64 {
        self.with(|state| state.lost)
    }
}

impl State {
    /// The interrupt of highest priority, as the IIR tells it.
    fn interrupt(&self) -> u8 {
        if self.interrupts & IER_RECEIVED != 0 && !self.input.is_empty() {
            IIR_RECEIVED
        } else if self.interrupts & IER_TRANSMITTER_EMPTY != 0 && self.transmitter_empty_pending {
            IIR_TRANSMITTER_EMPTY
        } else {
            IIR_NONE
        }
    }

    fn read(&mut self, offset: u16) -> u8 {
        let divisor = self.line_control & LCR_DIVISOR != 0;
        let [low, high] = self.divisor;
        match offset {
            0 if divisor => low,
            0 => self.input.pop_front().unwrap_or(0),
            1 if divisor => high,
            1 => self.interrupts,
            2 => {
                let identification = self.interrupt();
                if identification == IIR_TRANSMITTER_EMPTY {
                    self.transmitter_empty_pending = false;
                }
                identification | if self.fifo { IIR_FIFO } else { 0 }
            }
            3 => self.line_control,
            4 => self.modem_control,
            5 => {
                let data = if self.input.is_empty() { 0 } else { LSR_DATA };
                data | if self.output.len() < OUTPUT_MAX { LSR_TRANSMITTER_EMPTY } else { 0 }
            }
            6 if self.modem_control & MCR_LOOP != 0 => {
                // DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD.
                let out = self.modem_control;
                (out & 1) << 5 | (out >> 1 & 1) << 4 | (out >> 2 & 1) << 6 | (out >> 3 & 1) << 7
            }
            6 => MSR_CONNECTED,
            7 => self.scratch,
            _ => 0xFF,
        }
    }

    fn write(&mut self, offset: u16, value: u8) {
        let divisor = self.line_control & LCR_DIVISOR != 0;
        let [low, high] = &mut self.divisor;
        match offset {
            0 if divisor => *low = value,
            0 if self.modem_control & MCR_LOOP != 0 => {
                self.input.push_back(value);
                self.input.truncate(INPUT_MAX);
            }
            0 => {
                if self.output.len() < OUTPUT_MAX {
                    self.output.push(value);
                    self.transmitter_empty_pending = self.output.len() < OUTPUT_MAX;
                } else {
                    self.lost += 1;
                }
            }
            1 if divisor => *high = value,
            1 => {
                let enabled = value & !self.interrupts;
                self.interrupts = value & 0x0F;
                if enabled & IER_TRANSMITTER_EMPTY != 0 && self.output.len() < OUTPUT_MAX {
                    self.transmitter_empty_pending = true;
                }
            }
            2 => {
                self.fifo = value & FCR_ENABLE != 0;
                if value & FCR_CLEAR_INPUT != 0 {
                    self.input.clear();
                }
            }
            3 => self.line_control = value,
            4 => self.modem_control = value & 0x1F,
            7 => self.scratch = value,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::ioapic::Signal;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Signal for Count {
        fn signal(&self, _: u64, _: u32) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn port() -> (Serial, Arc<Count>, Arc<Mailbox>) {
        let count = Arc::new(Count::default());
        let ioapic = Arc::new(IoApic::new(count.clone()));
        ioapic.write(0, 0x10 + 2 * u32::from(SERIAL_PIN));
        ioapic.write(0x10, 0x30);
        let mailbox = Arc::new(Mailbox::new().unwrap());
        let serial = Serial::new(ioapic, mailbox.clone(), Arc::default());
        serial.write(4, MCR_OUT2);
        (serial, count, mailbox)
    }

    #[test]
    fn a_flood_of_output_is_bounded_and_the_transmitter_says_so() {
        let (serial, _, mailbox) = port();
        for _ in 0..OUTPUT_MAX + 10 {
            serial.write(0, b'x');
        }
        assert_eq!(serial.read(5) & LSR_TRANSMITTER_EMPTY, 0);
        assert_eq!(serial.lost(), 10);
        let mut output = vec![];
        serial.take_output(&mut output);
        assert_eq!(output.len(), OUTPUT_MAX);
        assert_ne!(serial.read(5) & LSR_TRANSMITTER_EMPTY, 0);
        assert_eq!(mailbox.take(), [Message::Serial]);
    }

    #[test]
    fn input_is_bounded_and_the_console_is_told_when_there_is_room() {
        let (serial, count, mailbox) = port();
        serial.write(1, IER_RECEIVED);
        serial.type_in(&[7; INPUT_MAX + 5]);
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert_eq!(serial.room(), 0);
        assert!(mailbox.take().is_empty());
        for _ in 0..INPUT_MAX {
            assert_eq!(serial.read(0), 7);
        }
        assert_eq!(serial.read(5) & LSR_DATA, 0);
        assert_eq!(mailbox.take(), [Message::Serial]);
    }

    #[test]
    fn enabling_the_transmitter_interrupt_raises_it_and_reading_iir_ends_it() {
        let (serial, count, _) = port();
        serial.write(1, IER_TRANSMITTER_EMPTY);
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert_eq!(serial.read(2) & 0xF, IIR_TRANSMITTER_EMPTY);
        assert_eq!(serial.read(2) & 0xF, IIR_NONE);
    }

    #[test]
    fn linux_finds_a_16550a() {
        let (serial, ..) = port();
        serial.write(2, FCR_ENABLE);
        assert_eq!(serial.read(2) & IIR_FIFO, IIR_FIFO);
        serial.write(4, MCR_LOOP | 0x0A);
        assert_eq!(serial.read(6) & 0xF0, 0x90);
    }

    proptest::proptest! {
        #[test]
        fn no_access_panics_or_grows_without_bound(accesses: Vec<(u16, u8, bool)>) {
            let (serial, ..) = port();
            for (offset, value, write) in accesses {
                if write { serial.write(offset % 9, value) } else { serial.read(offset % 9); }
                serial.type_in(&[value; 99]);
            }
            assert!(serial.room() <= INPUT_MAX);
        }
    }
}
