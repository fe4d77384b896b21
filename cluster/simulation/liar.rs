//! A member that repeats what it said before, when it led perhaps: everything that it once sent over a connection for replication
//! arrives again over a new one, at any later time, also after its removal.

use crate::dice::Dice;
use crate::world::World;

/// The liar of one run.
pub struct Liar {
    dice: Dice,
    per_mille: u64,
}

impl Liar {
    /// One who repeats much or nothing, as the seed says. Its numbers are its own.
    pub fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed ^ 0x006c_6961_725f_5f5f);
        let per_mille = dice.pick(&[0, 0, 80, 300]).unwrap_or(0);
        Self { dice, per_mille }
    }

    /// Perhaps repeats something.
    pub fn act(&mut self, world: &World) {
        if self.dice.chance(self.per_mille) {
            world.network.repeat(&mut self.dice);
        }
    }
}
