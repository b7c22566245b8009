export * from './pipeline';
export * from './processor';
