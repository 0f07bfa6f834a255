// The messages of a conversation: a tree, since an edited question or a second answer is a branch.

export class Tree {
  constructor(messages, leaf) {
    this.byId = new Map();
    this.children = new Map();
    for (const message of messages) this.add(message);
    this.leaf = leaf && this.byId.has(leaf) ? leaf : this.newestLeaf(null);
  }

  add(message) {
    const parent = message.parent ?? null;
    const siblings = this.children.get(parent) ?? [];
    const place = siblings.indexOf(message.id);
    if (place < 0) siblings.push(message.id);
    this.children.set(parent, siblings);
    this.byId.set(message.id, { status: "complete", ...message }); // defaults are left out
  }

  /** The messages from the first to the leaf. */
  path() {
    const path = [];
    let message = this.byId.get(this.leaf);
    while (message) {
      path.unshift(message);
      message = this.byId.get(message.parent ?? null);
    }
    return path;
  }

  siblings(message) {
    return this.children.get(message.parent ?? null) ?? [];
  }

  /** The end of the newest branch below a message, or of all. */
  newestLeaf(id) {
    let leaf = id;
    for (;;) {
      const below = this.children.get(leaf) ?? [];
      if (!below.length) return leaf;
      leaf = below[below.length - 1];
    }
  }
}
