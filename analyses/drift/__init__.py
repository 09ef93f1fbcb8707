"""How far a checkpoint has drifted from its alignment: indices, the ledger, where it broke."""
