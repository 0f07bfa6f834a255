// What a verification consists of: checks, each with a name, a verdict and a sentence.

export const check = (id, ok, text) => ({ id, ok, text });

export const either = (id, ok, holds, fails) => check(id, ok, ok ? holds : fails);
