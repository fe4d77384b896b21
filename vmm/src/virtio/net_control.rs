//! The control queue of a network card (virtio 1.3 section 5.1.6.5): what the driver asks for, how it is obeyed, and the byte
//! that answers it.

use std::sync::Arc;

use super::chain::{Chain, ChainError};
use super::device::{GuestMemory, Watch};
use super::net::Net;
use super::net_features as feature;
use super::net_pair::Due;
use super::net_queues::NetFailure;

const COMMANDS_PER_TURN: usize = 16;

/// Classes and commands.
const CLASS_ANNOUNCE: u8 = 3;
const ANNOUNCE_ACK: u8 = 0;
const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;
const CLASS_GUEST_OFFLOADS: u8 = 5;
const GUEST_OFFLOADS_SET: u8 = 0;

const OK: u8 = 0;
const ERROR: u8 = 1;

/// What a driver can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    /// The guest has told its neighbours where it is now.
    AnnounceAck,
    /// Use this many pairs of queues.
    Pairs(u16),
    /// Frames to the guest may leave undone what these feature bits say.
    Offloads(u64),
}

impl Command {
    /// Reads the command of a chain; nothing when it is none that we know, or too short.
    fn read(chain: &Chain, memory: &GuestMemory) -> Option<Self> {
        let mut reader = chain.reader(memory);
        match reader.read_array().ok()? {
            [CLASS_ANNOUNCE, ANNOUNCE_ACK] => Some(Self::AnnounceAck),
            [CLASS_MQ, MQ_VQ_PAIRS_SET] => reader.read_array().ok().map(u16::from_le_bytes).map(Self::Pairs),
            [CLASS_GUEST_OFFLOADS, GUEST_OFFLOADS_SET] => {
                reader.read_array().ok().map(u64::from_le_bytes).map(Self::Offloads)
            }
            _ => None,
        }
    }
}

/// Answers a command; how many bytes of the chain were filled.
///
/// # Errors
/// The driver left no place for the answer.
fn answer(chain: &Chain, memory: &GuestMemory, done: bool) -> Result<u32, ChainError> {
    chain.writer(memory).write(&[if done { OK } else { ERROR }])?;
    Ok(1)
}

impl Net {
    pub(super) fn run_control(&mut self, watch: &mut dyn Watch) {
        if self.paused || self.active.is_none() {
            return;
        }
        let result = self.commands(watch);
        self.end(result, watch);
    }

    fn commands(&mut self, watch: &mut dyn Watch) -> Result<(), NetFailure> {
        for _ in 0..COMMANDS_PER_TURN {
            let Some(active) = self.active.as_mut() else { return Ok(()) };
            let Some(chain) = active.control.pop()? else {
                if active.control.enable_kicks()? {
                    continue;
                }
                return self.publish_control();
            };
            let memory = Arc::clone(&active.memory);
            let done = Command::read(&chain, &memory).is_some_and(|command| self.obey(command, watch));
            let filled = answer(&chain, &memory, done)?;
            if let Some(active) = self.active.as_mut() {
                active.control.add_used(chain, filled)?;
            }
        }
        if let Some(active) = self.active.as_mut() {
            active.control_waits = true;
            self.turn.ask();
        }
        self.publish_control()
    }

    fn publish_control(&mut self) -> Result<(), NetFailure> {
        if let Some(active) = self.active.as_mut()
            && active.control.publish()?
        {
            active.interrupt.used(active.control.index());
        }
        Ok(())
    }

    /// Does what the driver asks for; false when that is not possible.
    fn obey(&mut self, command: Command, watch: &mut dyn Watch) -> bool {
        let Some(active) = self.active.as_mut() else { return false };
        let agreed = |feature| active.features & feature != 0;
        match command {
            Command::AnnounceAck if agreed(feature::GUEST_ANNOUNCE) => {
                self.announce = false;
                self.show_config();
                true
            }
            Command::Pairs(count) if agreed(feature::MQ) => {
                (1..=active.pairs.len()).contains(&usize::from(count)) && self.use_pairs(count.into(), watch)
            }
            Command::Offloads(bits) if agreed(feature::CTRL_GUEST_OFFLOADS) => {
                let possible = bits & !(active.features & feature::GUEST_OFFLOADS) == 0
                    && self
                        .hosts
                        .first()
                        .is_some_and(|host| host.tap.set_offload(feature::offloads(bits)).is_ok());
                if possible {
                    active.offloads = bits;
                }
                possible
            }
            _ => false,
        }
    }

    /// Lets the tap spread frames over the first `count` pairs. When it refuses, those stay in use that it took.
    pub(super) fn use_pairs(&mut self, count: usize, watch: &mut dyn Watch) -> bool {
        let Some(active) = self.active.as_mut() else { return false };
        let mut possible = true;
        active.in_use = 0;
        for (number, (pair, host)) in active.pairs.iter_mut().zip(&mut self.hosts).enumerate() {
            let wanted = number < count && possible;
            if !wanted {
                pair.unwatch(host, watch);
            }
            possible &= host.tap.attach(wanted).is_ok();
            if wanted && possible {
                active.in_use = number + 1;
            }
        }
        // The first one is never detached, so it is there in any case.
        active.in_use = active.in_use.max(1);
        self.run(watch, |_, _, _| Due::BOTH);
        possible
    }
}
