// What the reader of a store and its decoder of Zstandard both use.

export function must(condition, rule) {
  if (!condition) throw new Error(`must ${rule}`);
}

/** Bytes one after the other; a read beyond the end is an error. */
export class Bytes {
  constructor(buffer) {
    this.buffer = buffer;
    this.at = 0;
  }
  take(size) {
    must(this.at + size <= this.buffer.length, "not end in the middle of a part");
    this.at += size;
    return this.buffer.subarray(this.at - size, this.at);
  }
  rest = () => this.take(this.buffer.length - this.at);
  uint8 = () => this.take(1)[0];
  uint32 = () => this.take(4).readUInt32LE();
  uint64 = () => Number(this.take(8).readBigUInt64LE());
  varint() {
    for (let value = 0, shift = 1; ; shift *= 128) {
      const byte = this.uint8();
      value += (byte & 127) * shift;
      if (byte < 128) return value;
    }
  }
  end = () => must(this.at === this.buffer.length, "have no bytes behind the last part");
}

/** Bits of a section, from the least significant of its first byte. */
export function bit(section, i) {
  return (section[i >> 3] >> (i & 7)) & 1;
}
